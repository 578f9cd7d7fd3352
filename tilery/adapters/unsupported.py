"""What an adapter raises for arguments that no kernel here takes; `install` then calls the library it stands before."""


class Unsupported(NotImplementedError):
    """The call is legal in the original library, but no kernel of Tilery does it."""
