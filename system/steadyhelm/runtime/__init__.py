"""The services as Ray actors: start, deadlines, routing, replacement. The only package that imports Ray."""
