import asyncio

from agentweave_bus import SecureAgent, capability


class LegacyServiceAgent(SecureAgent):
    @capability("process")
    async def process(self, data: dict) -> dict:
        """Call legacy service securely."""
        # AgentWeave provides secure wrapper
        result = await self.legacy_client.call(data)
        return result


class LegacyClient:
    """Stands for the client of a service that knows nothing of agents."""

    async def call(self, data: dict) -> dict:
        return {"processed": data}


async def main():
    agent = LegacyServiceAgent.from_config()
    agent.legacy_client = LegacyClient()
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
