"""YAML in, frozen values out. Opens no checkpoint and knows no model."""
