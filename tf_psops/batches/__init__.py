"""How the rows of a batch are split over replicas, and what that means for a loss."""
