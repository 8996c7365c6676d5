import samf.web.hosted  # noqa: F401 - importing it starts the page
