"""The HTTP side: routes (`app`), and what a request passes before it reaches them."""
