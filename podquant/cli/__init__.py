"""One file per command: parse, call `app`, print. Imports stand inside commands, to keep the start fast."""
