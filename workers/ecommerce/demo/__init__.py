"""``make demo``: an order through the shop, and what becomes of attacks on it. Nothing is simulated.

Six agents run in processes of their own on a real broker with production settings. The adversary holds
real keys and a broker's full rights. Every line that says ``ok`` was checked, and the exit code is 0
only if all of them were. ``story`` tells it; ``stage`` runs the shop; ``adversary`` attacks; ``evidence``
looks at what really happened; ``screen`` writes.
"""
