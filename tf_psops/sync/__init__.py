"""One synchronisation, from the loss tracker to the moved weights."""
