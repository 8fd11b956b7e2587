"""The `claas` command. Commands import what they need when they run, so that `claas --help` is instant."""
