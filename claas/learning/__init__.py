"""From feedback to a published version: resolve, learn, check, journal."""
