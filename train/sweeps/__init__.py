"""`mc sweep`: runs of one task with several configurations, and their table."""
