"""What a config leaves open, what a run would cost, and the plan that it follows."""
