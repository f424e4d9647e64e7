"""Sources of drafts, behind one contract."""
