"""From a prompt vector to a domain by its nearest anchors."""
