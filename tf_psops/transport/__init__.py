"""What joins the workers: connections, and collectives over them."""
