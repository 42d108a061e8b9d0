"""An OpenAI-compatible HTTP server over a runtime: ``app`` routes, ``scheduler`` owns the model, ``process`` runs both."""
