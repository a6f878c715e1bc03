"""Google Cloud Storage over HTTP; gcsfs finds endpoint and credentials."""
