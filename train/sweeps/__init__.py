"""`mc sweep`: runs of one task under several configurations, in one table."""
