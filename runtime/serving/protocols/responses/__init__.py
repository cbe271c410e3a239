"""`/v1/responses`, as OpenAI's newer clients speak it; nothing is kept between requests."""

from .job import router

__all__ = ["router"]
