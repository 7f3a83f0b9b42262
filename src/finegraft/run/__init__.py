"""The main job: configurations, tuning, scoring, predicting, and merging for good."""
