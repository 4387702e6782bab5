"""Drop-ins for frameworks that implement DoRA themselves."""
