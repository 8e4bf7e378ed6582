"""What joins the two frameworks: weights, their conversion, and the proof that they agree."""
