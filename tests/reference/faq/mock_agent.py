from agentweave_bus.testing import MockSecureAgent, MockIdentityProvider

# Create mock agent for testing
async def test_my_capability():
    agent = MockSecureAgent(
        spiffe_id="spiffe://test.local/agent/test"
    )

    @agent.capability("process_data")
    async def process_data(test: str):
        return {"status": "success"}

    result = await agent.process_data({"test": "data"})
    assert result["status"] == "success"
