"""Pictures of which tokens stay: panels, rows of them, and the folder that they lie in."""
