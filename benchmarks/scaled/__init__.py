"""Ranks that train over links which can be throttled, and what the plan says of them and of larger clusters."""
