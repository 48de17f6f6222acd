"""From requests to answers: scores of candidates, retrieval from the whole catalogue, files of requests, and
a service with a page."""
