"""The FeedbackStore: every feedback item, from the moment it is accepted. Bodies filled by the storage work."""
