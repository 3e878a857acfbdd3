"""What the configuration is read with: TOML with places, the password, and where files are."""
