"""The web page: draw animals in a browser, on this machine."""

from bestiary.app.server import create_app, launch, read_credentials

__all__ = ["create_app", "launch", "read_credentials"]
