"""``dcp-resume``: verbs for operators. Each one parses, calls a session, and prints."""
