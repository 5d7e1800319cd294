"""Processes that train: what one does, how they are started and watched, what they tell, how they are stopped."""
