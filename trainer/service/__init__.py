"""A model behind HTTP: batching.py groups what arrives together, app.py is the web application, page/ what a browser shows of it."""
