-- The roles of EdgeMesh and its database, for psql as a superuser. Run again, it changes passwords to those of the files.
--
--   PASSWORDS=/etc/edgemesh/secrets/postgres psql --no-psqlrc --file=roles.sql postgres
--
-- PASSWORDS is a folder with owner-password, service-password, monitor-password and replication-password. The image
-- of PostgreSQL runs this file by itself when it lies in /docker-entrypoint-initdb.d.
\set ON_ERROR_STOP on
\set owner_password `cat "$PASSWORDS/owner-password"`
\set service_password `cat "$PASSWORDS/service-password"`
\set monitor_password `cat "$PASSWORDS/monitor-password"`
\set replication_password `cat "$PASSWORDS/replication-password"`

-- Statements with passwords must not be in the log, not even those that fail.
set log_statement = 'none';
set log_min_duration_statement = -1;
set log_min_error_statement = 'panic';
set password_encryption = 'scram-sha-256';

select length(:'owner_password') < 24 or length(:'service_password') < 24
  or length(:'monitor_password') < 24 or length(:'replication_password') < 24 as too_short \gset
\if :too_short
  do $$ begin
    raise exception 'a password is missing or shorter than 24 characters'
      using hint = 'PASSWORDS names a folder with owner-password, service-password, monitor-password, replication-password';
  end $$;
\endif

-- edgemesh_owner owns the tables and migrates; edgemesh is who servers connect as: docs/audit.md.
select format('create role %I', name)
from unnest(array['edgemesh_owner', 'edgemesh', 'edgemesh_monitor', 'edgemesh_replication']) as name
where not exists (select from pg_roles where rolname = name) \gexec
alter role edgemesh_owner login password :'owner_password';
alter role edgemesh login password :'service_password';
alter role edgemesh_monitor login password :'monitor_password' connection limit 5;
alter role edgemesh_replication login replication password :'replication_password' connection limit 10;
grant pg_monitor to edgemesh_monitor;

select 'create database edgemesh owner edgemesh_owner'
where not exists (select from pg_database where datname = 'edgemesh') \gexec
revoke all on database edgemesh from public;
grant connect on database edgemesh to edgemesh, edgemesh_monitor;

\connect edgemesh
create extension if not exists pg_stat_statements;
