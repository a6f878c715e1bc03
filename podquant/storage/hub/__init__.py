"""The Hugging Face hub: ids, downloads, reading by ranges."""
