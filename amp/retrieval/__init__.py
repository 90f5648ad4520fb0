"""Two-stage retrieval: frozen-CLIP pre-selection, action-aware re-ranking, recall beside its ceiling and its chance."""
