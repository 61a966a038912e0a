import { Migration } from '@mikro-orm/migrations'

/**
 * The life of identities: tokens bound more closely, approval, recovery, several certificate authorities side by side.
 *
 * Instances of the version before go on working: every new column has a default or may be null, and what they read keeps
 * its meaning. The one authority that they know stays the row with id 1; they must be gone before a rotation begins.
 */
export class IdentityLife extends Migration {
  override async up(): Promise<void> {
    // Null: any number of uses until the token expires. The version before takes such a token for used up.
    this.addSql('alter table enrollment_tokens alter column uses_max drop not null')
    this.addSql(`
      alter table enrollment_tokens
        add column device_id_pattern text,
        add column source_networks jsonb not null default '[]',
        add column requires_approval boolean not null default false`)
    // When the device was first given a certificate: null while it waits for approval.
    this.addSql('alter table token_redemptions add column completed_at timestamptz')
    this.addSql('create index token_redemptions_device on token_redemptions (device_id)')
    // A reusable token may have a hundred thousand, of which the newest are shown.
    this.addSql('create index token_redemptions_newest on token_redemptions (token_id, redeemed_at desc)')

    // The expired certificate with which a device came back and asked to be let in again.
    this.addSql('alter table devices add column recovery_serial text')
    this.addSql(`
      alter table certificates
        add column issuer_key_id text,
        add column csr_sha256 text`)
    // A certificate request is good once.
    this.addSql('create unique index certificates_csr on certificates (csr_sha256) where csr_sha256 is not null')

    // A key that is null is in CA_KEY_FILE.
    this.addSql(`
      alter table authorities
        drop constraint authorities_id_check,
        alter column root_key_pem drop not null,
        alter column intermediate_key_pem drop not null,
        add column stage text not null default 'issuing'
          check (stage in ('prepared', 'trusted', 'issuing', 'retired')),
        add column cross_pem text not null default ''`)
    this.addSql(`create unique index authorities_issuing on authorities (stage) where stage = 'issuing'`)

    this.addSql(`
      alter table device_postures
        add column trust_bundle_id text not null default '',
        add column issuer_key_id text not null default '',
        add column clock_offset_ms bigint`)

    // Counters of rate limits that hold across instances. They may be lost with a crash, so they are not logged.
    this.addSql(`
      create unlogged table rate_limits (
        key varchar(255) primary key,
        points integer not null default 0,
        expire bigint
      )`)
  }

  override async down(): Promise<void> {
    this.addSql('drop table rate_limits')
    this.addSql(`
      alter table device_postures
        drop column trust_bundle_id,
        drop column issuer_key_id,
        drop column clock_offset_ms`)
    this.addSql('drop index authorities_issuing')
    // The version before knows one authority, the row with id 1; it must be the one whose certificates are about.
    this.addSql(`
      do $$ begin
        if exists (select from authorities where stage in ('trusted', 'retired')) then
          raise exception 'the certificate authority is being replaced: finish that, or take it back, with edgemesh ca rotate';
        end if;
        if exists (select from authorities where stage = 'issuing' and intermediate_key_pem is null) then
          raise exception 'the key of the certificate authority is in CA_KEY_FILE, which the version before does not know';
        end if;
      end $$`)
    this.addSql(`delete from authorities where stage <> 'issuing'`)
    this.addSql('update authorities set id = 1')
    this.addSql(`
      alter table authorities
        drop column stage,
        drop column cross_pem,
        alter column root_key_pem set not null,
        alter column intermediate_key_pem set not null,
        add constraint authorities_id_check check (id = 1)`)
    this.addSql('drop index certificates_csr')
    this.addSql('alter table certificates drop column issuer_key_id, drop column csr_sha256')
    this.addSql('alter table devices drop column recovery_serial')
    this.addSql('drop index token_redemptions_device')
    this.addSql('drop index token_redemptions_newest')
    this.addSql('alter table token_redemptions drop column completed_at')
    // A token without a number of uses means nothing to the version before: it is ended by what it has been used.
    this.addSql('update enrollment_tokens set uses_max = greatest(uses, 1) where uses_max is null')
    this.addSql(`
      alter table enrollment_tokens
        alter column uses_max set not null,
        drop column device_id_pattern,
        drop column source_networks,
        drop column requires_approval`)
  }
}
