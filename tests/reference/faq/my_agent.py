import asyncio

from agentweave_bus import SecureAgent


class MyAgent(SecureAgent):
    async def on_svid_update(self, new_svid):
        """Called when SVID rotates."""
        self.logger.info(
            "SVID rotated",
            extra={"expiry": new_svid.expiry.isoformat()}
        )


if __name__ == "__main__":
    asyncio.run(MyAgent.from_config().run())
