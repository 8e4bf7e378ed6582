"""`mc sweep`: many runs of one recall task, and what they show together."""
