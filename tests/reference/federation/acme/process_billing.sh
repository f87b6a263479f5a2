agentweave call \
    --target spiffe://acme-corp.io/agent/billing \
    --capability process_billing \
    --data '{
        "customer_id": "cust-123",
        "amount": "99.99",
        "description": "Monthly subscription"
    }'
