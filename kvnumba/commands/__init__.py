"""What ``python -m kvnumba`` runs."""
