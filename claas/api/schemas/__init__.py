"""What goes over the wire, one file for each group of routes. Unknown fields are errors; nothing is dropped."""
