"""What requests and replies hold: models, the sentences about what is wrong with a request, and the OpenAPI document."""
