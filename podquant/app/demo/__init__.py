"""`podquant demo`'s model, from the packages of the dependency group `demo`: nothing else needs them or this."""
