from mcl_kernels.distributed.plan import ExchangePlan, plan_exchange

__all__ = ["ExchangePlan", "plan_exchange"]
