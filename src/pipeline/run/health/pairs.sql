-- The training pairs: the lengths of the chosen and of the rejected answers.
with paired as (
  select prompt_id, cast(cardinality(chosen_token_ids) as double) as chosen,
         cast(cardinality(rejected_token_ids) as double) as rejected
  from {pairs} where round = $round
)
select 'chosen_tokens' as metric, avg(chosen) as value, count(chosen) as n from paired
union all
select 'rejected_tokens', avg(rejected), count(rejected) from paired
union all
select 'length_ratio', avg(chosen) / nullif(avg(rejected), 0), count(chosen) from paired
