"""What keeps Keras in step with a swarm."""
