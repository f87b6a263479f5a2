"""The control role: it makes what workers use on the broker, and only it may."""
