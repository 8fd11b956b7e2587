"""The database: models, migrations, connections. Holds rows; what they mean is said above this room."""
