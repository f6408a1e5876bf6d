"""Planning: what hardware there is, what a plan would cost on it, and which plan is fastest."""
