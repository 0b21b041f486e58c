"""Backups of a swarm, and how training resumes from them."""
