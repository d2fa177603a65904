"""TaskServer under load: speed beside its bank, and what it must survive."""
