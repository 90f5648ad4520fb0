"""Two-stage retrieval: pre-selection by the frozen CLIP, action-aware re-ranking, and recall."""
