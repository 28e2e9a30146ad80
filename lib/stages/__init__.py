"""How a script takes settings, resumes, locks and streams. Knows nothing of relevance, imports no other
room."""
