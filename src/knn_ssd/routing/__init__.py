"""Routing: from a prompt vector to a domain by the nearest anchors, and to the plan of the request."""
